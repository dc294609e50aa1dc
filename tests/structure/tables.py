"""The groups of units of each model of `models.py`, found by reasoning alone.

`TABLES[name]` lists (size, {(path, axis): positions of a unit there}), `FLAGS[name]`
the flags of each, `FROZEN[name]` the axes longer than 1 in which no position can go,
and `PARTLY_FROZEN[name]` how many positions of an axis are frozen beside its groups.

A group is written as its size, where its units are, and its flags. "a/kernel:1" is
axis 1 of the kernel of a; "a/kernel:0,1" both axes; "a/kernel:1*3" axis 1 with three
positions a unit.
"""

TABLES: dict[str, list[tuple[int, dict[tuple[str, int], int]]]] = {}
FLAGS: dict[str, list[set[str]]] = {}
FROZEN: dict[str, set[tuple[str, int]]] = {}
PARTLY_FROZEN: dict[str, dict[tuple[str, int], int]] = {}

MIXED, POSITIONAL = "mixed", "positional"


def _axes(text, name):
    """The (path, axis) and positions that `text` names."""
    found = {}
    for word in text.split():
        path, _, axes = word.rpartition(":")
        axes, _, positions = axes.partition("*")
        for axis in axes.split(","):
            member = name(path), int(axis)
            assert member not in found, f"{member} is named twice"
            found[member] = int(positions or 1)
    return found


def _table(model, *groups, frozen, partly="", name=lambda path: path):
    """Enters groups (size, members, flags...) of a model; `name` completes paths."""
    TABLES[model] = [(size, _axes(members, name)) for size, members, *_ in groups]
    FLAGS[model] = [set(flags) for _, _, *flags in groups]
    FROZEN[model] = set(_axes(frozen, name))
    PARTLY_FROZEN[model] = _axes(partly, name)


def _in_params(path):
    return path if path.startswith("batch_stats/") else f"params/{path}"


def _linen(model, *groups, **rest):
    _table(model, *groups, name=_in_params, **rest)


def _nnx(model, *groups, **rest):
    _table(model, *groups, name=lambda path: f"{path}/value", **rest)


# Which axes of a layer of Flax its outputs and inputs are.


def dense_out(*layers, times=1):
    return " ".join(f"{x}/kernel:1*{times} {x}/bias:0*{times}" for x in layers)


def dense_in(*layers, times=1):
    return " ".join(f"{x}/kernel:0*{times}" for x in layers)


def conv_out(*layers, times=1):
    return " ".join(f"{x}/kernel:3*{times} {x}/bias:0*{times}" for x in layers)


def kernel_out(*layers):
    """The outputs of convolutions without bias."""
    return " ".join(f"{x}/kernel:3" for x in layers)


def conv_in(*layers, times=1):
    return " ".join(f"{x}/kernel:2*{times}" for x in layers)


def space(*layers):
    return " ".join(f"{x}/kernel:0,1" for x in layers)


def norm(*layers, times=1):
    return " ".join(f"{x}/scale:0*{times} {x}/bias:0*{times}" for x in layers)


def batch_norm(*layers):
    averages = [f"batch_stats/{x}/mean:0 batch_stats/{x}/var:0" for x in layers]
    return f"{norm(*layers)} {' '.join(averages)}"


def attention_width(x):
    """The residual stream that an attention reads and writes."""
    reads = dense_in(f"{x}/query", f"{x}/key", f"{x}/value")
    return f"{reads} {x}/out/kernel:2 {x}/out/bias:0"


def attention_groups(x, heads, head_size):
    query, key, value, out = (f"{x}/{z}" for z in ("query", "key", "value", "out"))
    return [
        (
            heads,
            f"{query}/kernel:1 {query}/bias:0 {key}/kernel:1 {key}/bias:0"
            f" {value}/kernel:1 {value}/bias:0 {out}/kernel:0",
        ),
        (head_size, f"{query}/kernel:2 {query}/bias:1 {key}/kernel:2 {key}/bias:1"),
        (head_size, f"{value}/kernel:2 {value}/bias:1 {out}/kernel:1"),
    ]


# Perceptrons and convolutions in linen.

_linen(
    "mlp",
    (16, f"{dense_out('layers_0')} {dense_in('layers_2')}"),
    (12, f"{dense_out('layers_2')} {dense_in('layers_4')}"),
    frozen=f"{dense_in('layers_0')} {dense_out('layers_4')}",
)

_linen(
    "lenet",
    (6, f"{conv_out('Conv_0')} {conv_in('Conv_1')}"),
    # 12 x 8 pixels, halved twice, are flattened.
    (10, f"{conv_out('Conv_1')} {dense_in('Dense_0', times=6)}"),
    (14, f"{dense_out('Dense_0')} {dense_in('Dense_1')}"),
    frozen=f"{space('Conv_0', 'Conv_1')} {conv_in('Conv_0')} {dense_out('Dense_1')}",
)

for _name in ("vgg", "vgg_train"):
    _widths = (8, 8, 12, 12, 16)
    _linen(
        _name,
        *(
            (
                width,
                f"{kernel_out(f'Conv_{n}')} {batch_norm(f'BatchNorm_{n}')}"
                f" {conv_in(f'Conv_{n + 1}')}",
            )
            for n, width in enumerate(_widths)
        ),
        # 2 x 2 pixels are flattened.
        (
            16,
            f"{kernel_out('Conv_5')} {batch_norm('BatchNorm_5')}"
            f" {dense_in('Dense_0', times=4)}",
        ),
        (20, f"{dense_out('Dense_0')} {dense_in('Dense_1')}"),
        frozen=f"{space(*(f'Conv_{n}' for n in range(6)))} {conv_in('Conv_0')}"
        f" {dense_out('Dense_1')}",
    )

for _name in ("resnet", "resnet_train"):
    _linen(
        _name,
        # The residual streams before and after the projection.
        (
            8,
            f"{kernel_out('stem', 'block0_second')}"
            f" {batch_norm('stem_norm', 'block0_second_norm')}"
            f" {conv_in('block0_first', 'block1_first', 'block1_skip')}",
        ),
        (
            12,
            f"{kernel_out('block1_second', 'block1_skip', 'block2_second')}"
            f" {batch_norm('block1_second_norm', 'block1_skip_norm')}"
            f" {batch_norm('block2_second_norm')}"
            f" {conv_in('block2_first')} {dense_in('head')}",
        ),
        *(
            (
                width,
                f"{kernel_out(f'block{n}_first')} {batch_norm(f'block{n}_first_norm')}"
                f" {conv_in(f'block{n}_second')}",
            )
            for n, width in enumerate((8, 12, 12))
        ),
        frozen=f"{space('stem')} {conv_in('stem')} {dense_out('head')} "
        + space(*(f"block{n}_{z}" for n in range(3) for z in ("first", "second"))),
    )

_linen(
    "densenet",
    (
        8,
        f"{conv_out('Conv_0')} {conv_in('Conv_1', 'Conv_2', 'Conv_3', 'Conv_4')} "
        + batch_norm("BatchNorm_0", "BatchNorm_1", "BatchNorm_2"),
    ),
    (
        6,
        f"{conv_out('Conv_1')} {batch_norm('BatchNorm_1', 'BatchNorm_2')}"
        f" {conv_in('Conv_2', 'Conv_3', 'Conv_4')}",
    ),
    (
        5,
        f"{conv_out('Conv_2')} {batch_norm('BatchNorm_2')}"
        f" {conv_in('Conv_3', 'Conv_4')}",
    ),
    (4, f"{conv_out('Conv_3')} {conv_in('Conv_4')}"),
    (10, f"{conv_out('Conv_4')} {dense_in('Dense_0')}"),
    frozen=f"{space('Conv_0', 'Conv_1', 'Conv_2', 'Conv_3')} {conv_in('Conv_0')}"
    f" {dense_out('Dense_0')}",
)

_linen(
    "mobilenet",
    # The residual stream, with two outputs a channel from `multiply`.
    (
        8,
        f"{conv_out('stem', 'project')} {conv_in('expand')}"
        f" {conv_out('multiply', times=2)} {conv_in('pointwise', times=2)}",
    ),
    (2, f"{conv_out('multiply', times=8)} {conv_in('pointwise', times=8)}"),
    (
        24,
        f"{conv_out('expand', 'depthwise')} {dense_in('squeeze')}"
        f" {dense_out('excite')} {conv_in('project')}",
    ),
    (6, f"{dense_out('squeeze')} {dense_in('excite')}"),
    # Four groups; the inputs of a group; the outputs of a group.
    (
        4,
        f"{conv_out('pointwise', times=5)} {conv_out('grouped', times=3)}"
        f" {dense_in('head', times=3)}",
    ),
    (5, f"{conv_out('pointwise', times=4)} {conv_in('grouped')}"),
    (3, f"{conv_out('grouped', times=4)} {dense_in('head', times=4)}"),
    frozen=f"{space('stem', 'depthwise', 'multiply', 'grouped')} {conv_in('stem')}"
    f" {dense_out('head')}",
)

# Output o of `multiply` belongs to channel o // 2 and to group o // 4: channel c is
# number c % 2 of the two channels of group c // 2.
_linen(
    "depthwise_into_grouped",
    (
        4,
        f"{conv_out('stem', times=2)} {conv_out('multiply', times=4)}"
        f" {conv_out('grouped', times=3)} {dense_in('head', times=3)}",
    ),
    (
        2,
        f"{conv_out('stem', times=4)} {conv_out('multiply', times=8)}"
        f" {conv_in('grouped', times=2)}",
    ),
    (2, f"{conv_out('multiply', times=8)} {conv_in('grouped', times=2)}"),
    (3, f"{conv_out('grouped', times=4)} {dense_in('head', times=4)}"),
    frozen=f"{space('stem', 'multiply', 'grouped')} {conv_in('stem')}"
    f" {dense_out('head')}",
)

_linen(
    "unet",
    (6, f"{conv_out('high')} {conv_in('middle', 'head')}"),
    (10, f"{conv_out('middle')} {conv_in('low', 'merge')}"),
    (14, f"{conv_out('low')} {conv_in('merge')}"),
    (9, f"{conv_out('merge')} {conv_in('up')}"),
    (7, f"{conv_out('up')} {conv_in('head')}"),
    frozen=f"{space('high', 'middle', 'low', 'merge', 'up')} {conv_in('high')}"
    f" {conv_out('head')}",
)

_linen(
    "norm_cnn",
    # Four groups of three channels: statistics run over the three.
    (
        4,
        f"{conv_out('Conv_0', times=3)} {norm('GroupNorm_0', times=3)}"
        f" {conv_in('Conv_1', times=3)}",
    ),
    (
        3,
        f"{conv_out('Conv_0', times=4)} {norm('GroupNorm_0', times=4)}"
        f" {conv_in('Conv_1', times=4)}",
        MIXED,
    ),
    (10, f"{conv_out('Conv_1')} {norm('InstanceNorm_0')} {dense_in('Dense_0')}"),
    frozen=f"{space('Conv_0', 'Conv_1')} {conv_in('Conv_0')} {dense_out('Dense_0')}",
)

_linen(
    "pixel_shuffle",
    (5, f"{conv_out('Conv_0', times=4)} {conv_in('Conv_1')}"),
    frozen=f"{space('Conv_0', 'Conv_1')} {conv_in('Conv_0')} {conv_out('Conv_1')}",
)

_linen(
    "input_skip",
    (16, f"{dense_out('Dense_0')} {dense_in('Dense_1')}"),
    (12, f"{dense_out('Dense_1')} {dense_in('Dense_2')}"),
    frozen=f"{dense_in('Dense_0')} {dense_out('Dense_2')}",
    partly=dense_in("Dense_1", times=7),
)


# Transformers and recurrent networks in linen.

for _name, _flags in (("encoder", ()), ("encoder_dropout", (POSITIONAL,))):
    _linen(
        _name,
        (
            12,
            f"{dense_out('embed')} positions:2 {norm('norm')} {dense_in('head')} "
            + " ".join(
                f"{norm(f'norm{n}_attention', f'norm{n}_mlp')}"
                f" {attention_width(f'attention{n}')}"
                f" {dense_in(f'up{n}')} {dense_out(f'down{n}')}"
                for n in range(2)
            ),
            MIXED,
        ),
        *attention_groups("attention0", 4, 5),
        *attention_groups("attention1", 4, 5),
        (24, f"{dense_out('up0')} {dense_in('down0')}", *_flags),
        (24, f"{dense_out('up1')} {dense_in('down1')}", *_flags),
        frozen=f"{dense_in('embed')} positions:1 {dense_out('head')}",
    )

# Axis 0 of what nn.scan stacks is the layer.
_linen(
    "scanned_transformer",
    (
        12,
        "embed/embedding:1 head/kernel:0"
        " layers/norm_attention/scale:1 layers/norm_attention/bias:1"
        " layers/attention/query/kernel:1 layers/attention/key/kernel:1"
        " layers/attention/value/kernel:1 layers/attention/out/kernel:3"
        " layers/attention/out/bias:1 layers/norm_mlp/scale:1 layers/norm_mlp/bias:1"
        " layers/up/kernel:1 layers/down/kernel:2 layers/down/bias:1",
        MIXED,
    ),
    (
        4,
        "layers/attention/query/kernel:2 layers/attention/query/bias:1"
        " layers/attention/key/kernel:2 layers/attention/key/bias:1"
        " layers/attention/value/kernel:2 layers/attention/value/bias:1"
        " layers/attention/out/kernel:1",
    ),
    (
        5,
        "layers/attention/query/kernel:3 layers/attention/query/bias:2"
        " layers/attention/key/kernel:3 layers/attention/key/bias:2",
    ),
    (
        5,
        "layers/attention/value/kernel:3 layers/attention/value/bias:2"
        " layers/attention/out/kernel:2",
    ),
    (24, "layers/up/kernel:2 layers/up/bias:1 layers/down/kernel:1"),
    frozen="embed/embedding:0 head/kernel:1 head/bias:0"
    " layers/norm_attention/scale:0 layers/norm_attention/bias:0"
    " layers/attention/query/kernel:0 layers/attention/query/bias:0"
    " layers/attention/key/kernel:0 layers/attention/key/bias:0"
    " layers/attention/value/kernel:0 layers/attention/value/bias:0"
    " layers/attention/out/kernel:0 layers/attention/out/bias:0"
    " layers/norm_mlp/scale:0 layers/norm_mlp/bias:0"
    " layers/up/kernel:0 layers/up/bias:0 layers/down/kernel:0 layers/down/bias:0",
)

# The gates of a cell are kernels of their own: from the input without bias in an LSTM,
# from the state without bias in a GRU but for the candidate.
_linen(
    "recurrent",
    (
        11,
        " ".join(
            f"fast_lstm/i{z}/kernel:1 fast_lstm/h{z}/kernel:0,1 fast_lstm/h{z}/bias:0"
            for z in "ifgo"
        )
        + " gru/ir/kernel:0 gru/iz/kernel:0 gru/in/kernel:0",
    ),
    (
        9,
        f"{dense_out('gru/ir', 'gru/iz', 'gru/in')}"
        " gru/hr/kernel:0,1 gru/hz/kernel:0,1 gru/hn/kernel:0,1 gru/hn/bias:0"
        " lstm/ii/kernel:0 lstm/if/kernel:0 lstm/ig/kernel:0 lstm/io/kernel:0",
    ),
    (
        8,
        " ".join(
            f"lstm/i{z}/kernel:1 lstm/h{z}/kernel:0,1 lstm/h{z}/bias:0" for z in "ifgo"
        )
        + " head/kernel:0",
    ),
    frozen="fast_lstm/ii/kernel:0 fast_lstm/if/kernel:0 fast_lstm/ig/kernel:0"
    " fast_lstm/io/kernel:0 head/kernel:1 head/bias:0",
)

_linen(
    "mixed_bf16",
    (16, f"{dense_out('Dense_0')} {norm('LayerNorm_0')} {dense_in('Dense_1')}", MIXED),
    (12, f"{dense_out('Dense_1')} {dense_in('Dense_2')}"),
    frozen=f"{dense_in('Dense_0')} {dense_out('Dense_2')}",
)


# nnx.

_nnx(
    "nnx_transformer",
    (
        12,
        "embed/embedding:1 head/kernel:0 "
        + " ".join(
            f"{norm(f'blocks/{n}/norm_attention')}"
            f" {attention_width(f'blocks/{n}/attention')} blocks/{n}/norm_mlp/scale:0"
            f" {dense_in(f'blocks/{n}/up')} {dense_out(f'blocks/{n}/down')}"
            for n in range(2)
        ),
        MIXED,
    ),
    *attention_groups("blocks/0/attention", 4, 5),
    *attention_groups("blocks/1/attention", 4, 5),
    # A unit is a position of the gate and the one it gates.
    (24, f"{dense_out('blocks/0/up', times=2)} {dense_in('blocks/0/down')}"),
    (24, f"{dense_out('blocks/1/up', times=2)} {dense_in('blocks/1/down')}"),
    frozen="embed/embedding:0 head/kernel:1 head/bias:0",
)

for _name in ("nnx_cnn", "nnx_cnn_train"):
    _nnx(
        _name,
        (
            6,
            f"{conv_out('conv1')} {norm('norm1')} norm1/mean:0 norm1/var:0"
            f" {conv_in('conv2')}",
        ),
        (
            10,
            f"{conv_out('conv2')} {norm('norm2')} norm2/mean:0 norm2/var:0"
            f" {dense_in('hidden', times=8)}",
        ),
        (14, f"{dense_out('hidden')} {dense_in('head')}"),
        frozen=f"{space('conv1', 'conv2')} {conv_in('conv1')} {dense_out('head')}",
    )


# Transformers in plain JAX.


def _each_layer(text, layers=2):
    """`text` for each layer; ~ stands for the path of the layer."""
    return " ".join(text.replace("~", f"layers/{n}/") for n in range(layers))


def _layer_groups(*groups, layers=2):
    return [
        (size, text.replace("~", f"layers/{n}/"), *flags)
        for n in range(layers)
        for size, text, *flags in groups
    ]


_table(
    "gpt_gqa_rope",
    (
        16,
        "embed:1 norm:0 "
        + _each_layer(
            "~norm_attention:0 ~query:0 ~key:0 ~value:0 ~out:2"
            " ~norm_mlp:0 ~gate:0 ~up:0 ~down:1"
        ),
        MIXED,
    ),
    *_layer_groups(
        # Query head h uses key head h // 4 and is number h % 4 of those that do.
        (2, "~query:1*4 ~key:1 ~value:1 ~out:0*4"),
        (4, "~query:1*2 ~out:0*2"),
        # Rotary positions turn dimension i together with i + 3.
        (3, "~query:2*2 ~key:2*2", POSITIONAL),
        (6, "~value:2 ~out:1"),
        (20, "~gate:1 ~up:1 ~down:0"),
    ),
    frozen="embed:0",
)

_table(
    "gpt_fused_qkv",
    (
        16,
        f"embed:1 positions:1 {_each_layer('~qkv:0 ~out:1 ~up:0 ~down:1')}",
        MIXED,
    ),
    *_layer_groups(
        # A head has four dimensions in each of queries, keys and values.
        (3, "~qkv:1*12 ~qkv_bias:0*12 ~out:0*4"),
        # A dimension is in three heads: of queries and keys; of values.
        (4, "~qkv:1*6 ~qkv_bias:0*6"),
        (4, "~qkv:1*3 ~qkv_bias:0*3 ~out:0*3"),
        (20, "~up:1 ~up_bias:0 ~down:0"),
    ),
    # Positions beyond these tokens are for longer texts, not for pruning.
    frozen="embed:0 positions:0",
)

_table(
    "gqa_dot_product_attention",
    (2, "query:1*3 key:1 value:1 out:0*3"),
    (3, "query:1*2 out:0*2"),
    (4, "query:2 key:2"),
    (4, "value:2 out:1"),
    frozen="query:0 key:0 value:0 out:2",
)

_table(
    "vit",
    (
        16,
        "patch:1 patch_bias:0 class:2 positions:2 norm:0 head:0 "
        + _each_layer(
            "~norm_attention:0 ~qkv:0 ~out:2 ~norm_mlp:0 ~up:0 ~down:1 ~down_bias:0"
        ),
        MIXED,
    ),
    *_layer_groups(
        (2, "~qkv:2 ~qkv_bias:1 ~out:0"),
        # One axis holds the dimensions of queries, keys and values.
        (6, "~qkv:3 ~qkv_bias:2 ~out:1"),
        (20, "~up:1 ~up_bias:0 ~down:0"),
    ),
    frozen="patch:0 positions:1 head:1 head_bias:0 "
    + _each_layer("~qkv:1 ~qkv_bias:0"),
)

_table(
    "swin",
    (
        12,
        "embed:1 head:0 "
        + _each_layer(
            "~norm_attention:0 ~query:0 ~key:0 ~value:0 ~out:2"
            " ~norm_mlp:0 ~up:0 ~down:1"
        ),
        MIXED,
    ),
    *_layer_groups(
        (3, "~query:1 ~key:1 ~value:1 ~out:0 ~bias:1"),
        (4, "~query:2 ~key:2"),
        (5, "~value:2 ~out:1"),
        (20, "~up:1 ~down:0"),
    ),
    frozen=f"embed:0 head:1 {_each_layer('~bias:0')}",
)

_table(
    "t5_relative_bias",
    (
        16,
        "embed:1 norm:0 head:0 "
        + _each_layer(
            "~norm_attention:0 ~query:0 ~key:0 ~value:0 ~out:1"
            " ~norm_mlp:0 ~up:0 ~down:1"
        ),
        MIXED,
    ),
    (3, f"bias:1 {_each_layer('~query:1*4 ~key:1*4 ~value:1*4 ~out:0*4')}"),
    *_layer_groups(
        (4, "~query:1*3 ~key:1*3"),
        (4, "~value:1*3 ~out:0*3"),
        (20, "~up:1 ~down:0"),
    ),
    frozen="embed:0 bias:0 head:1",
)


# Experts.

# argmax needs every score of the router. What it chose is compared with the experts'
# numbers, so that an expert can go whose score stays: it gets no token.
_table(
    "moe_one_hot",
    (12, "embed:1 router:0 up:1 down:2 head:0"),
    (4, "up:0 down:0", POSITIONAL),
    (10, "up:2 down:1"),
    frozen="embed:0 router:1 head:1",
)

_table(
    "moe_soft",
    (12, "embed:1 router:0 up:1 down:2 head:0"),
    (4, "router:1 up:0 down:0", MIXED),
    (10, "up:2 down:1"),
    frozen="embed:0 head:1",
)

_table(
    "moe_ragged",
    (9, "first:1 embed:0"),
    frozen="first:0 embed:1 router:0,1 up:0,1,2 down:0,1,2 head:0,1",
)


# Other programs in plain JAX.

_table(
    "ssm",
    (16, "embed:1 norm:0 in:0 out:1 head:0", MIXED),
    (10, "in:1*2 select:0 step:1 step_bias:0 rate:0 through:0 out:0"),
    # The rank of the step; the state, which is written to and read from.
    (2, "select:1 step:0"),
    (3, "select:1*2 rate:1"),
    frozen="embed:0 head:1",
)

_table(
    "cond_while",
    # No skip connection leads past the branches. The loop ends by a sum over the units.
    (12, "in:1 left/up:0 right/up:0"),
    (12, "left/down:1 right/down:1 loop:0,1 loop_bias:0 head:0", MIXED),
    (16, "left/up:1 left/down:0"),
    (9, "right/up:1 right/down:0"),
    frozen="in:0 head:1",
)

_table(
    "tied_autoencoder",
    (12, "first:1 first_bias:0 second:0 first_back:0"),
    (5, "second:1 second_bias:0"),
    frozen="first:0 second_back:0",
)

_table(
    "weight_norm",
    # The norm of a column runs over the units before it.
    (12, "layers/0/kernel:1 layers/0/scale:0 layers/0/bias:0 layers/1/kernel:0", MIXED),
    (9, "layers/1/kernel:1 layers/1/scale:0 layers/1/bias:0 layers/2/kernel:0", MIXED),
    frozen="layers/0/kernel:0 layers/2/kernel:1 layers/2/scale:0 layers/2/bias:0",
)

_table(
    "maxout",
    (12, "kernel:1*3 bias:0*3 head:0"),
    (3, "kernel:1*12 bias:0*12", MIXED),
    frozen="kernel:0 head:1",
)

_table(
    "equal_sizes_cnn",
    (8, "conv1:3 bias1:0 conv2:2"),
    (8, "conv2:3 bias2:0 hidden:0"),
    (8, "hidden:1 head:0"),
    frozen="conv1:0,1,2 conv2:0,1 head:1",
)

_table(
    "equal_sizes_attention",
    (4, "embed:1 query:0 key:0 value:0 out:2 up:0 down:1 head:0"),
    (4, "query:1 key:1 value:1 out:0"),
    (4, "query:2 key:2"),
    (4, "value:2 out:1"),
    (4, "up:1 down:0"),
    frozen="embed:0 head:1",
)

_table(
    "several_outputs",
    (16, "tasks:1 embed:1 hidden:0"),
    (12, "hidden:1 last:0 class:0 number:0"),
    frozen="tasks:0 embed:0 last:1 class:1",
)

_table(
    "strided_slices",
    (6, "conv:3 kernel:0"),
    (10, "kernel:1*2 bias:0*2 head:0"),
    frozen="conv:0,1,2 head:1",
)

_table(
    "vmapped_grouped_conv",
    # Two groups; the inputs of a group; the outputs of a group.
    (2, "first:4*6 second:4*5 head:1*5"),
    (6, "first:4*2 second:3"),
    (5, "second:4*2 head:1*2"),
    frozen="first:0,1,2,3 second:0,1,2 head:0,2",
)

_table(
    "fft",
    (9, "first:1 second:0"),
    frozen="first:0 second:1 head:0,1",
)


# Equinox: a weight is (outputs, inputs, space).

_table(
    "equinox_mlp",
    (16, "layers/0/weight:0 layers/0/bias:0 layers/1/weight:1"),
    (16, "layers/1/weight:0 layers/1/bias:0 layers/2/weight:1"),
    frozen="layers/0/weight:1 layers/2/weight:0 layers/2/bias:0",
)

_table(
    "equinox_conv",
    (6, "layers/0/weight:0 layers/0/bias:0 layers/3/weight:1"),
    # Five groups of two channels, 4 x 3 pixels flattened.
    (
        5,
        "layers/3/weight:0*2 layers/3/bias:0*2 layers/4/weight:0*2 layers/4/bias:0*2"
        " layers/6/weight:1*24",
    ),
    (
        2,
        "layers/3/weight:0*5 layers/3/bias:0*5 layers/4/weight:0*5 layers/4/bias:0*5"
        " layers/6/weight:1*60",
        MIXED,
    ),
    (12, "layers/6/weight:0 layers/6/bias:0 layers/8/weight:1"),
    frozen="layers/0/weight:1,2,3 layers/3/weight:2,3"
    " layers/8/weight:0 layers/8/bias:0",
)
