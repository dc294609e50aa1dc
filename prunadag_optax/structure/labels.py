"""Which positions of which axes survive together.

Every position of every axis carries a set of atoms, and survives while all of them do.
Positions that an equation makes the same have their sets made equal: by substitution,
atom -> set. A set with one atom couples; one with several is a product, as head x
dimension after two axes were merged; the empty set is frozen and always survives.
Sets have numbers, so that an axis is an array of integers and most work is NumPy's.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

Ids = np.ndarray
FROZEN, ATOM, PRODUCT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a position is frozen.

    Attributes:
      text: one clause, "is an axis of the model's output".
      primitive: the primitive where it happened, or None.
      source: the source of its equation, or None.
      because: the reason of what it was joined with, or None.
    """

    text: str
    primitive: str | None = None
    source: Any = None
    because: "Reason | None" = None

    def root(self) -> "Reason":
        """The first reason in the chain."""
        reason = self
        while reason.because is not None:
            reason = reason.because
        return reason


class Labels:
    """The sets of atoms by number."""

    def __init__(self) -> None:
        self._count = 0
        self._kind = np.zeros(1024, np.int8)
        # The set itself, or the one that was put in its place.
        self._next = np.zeros(1024, np.int32)
        self._flags = np.zeros(1024, np.uint32)
        # Atoms that are in a product; products with an atom that was replaced.
        self._inside = np.zeros(1024, bool)
        self._stale = np.zeros(1024, bool)
        self._reasons: dict[int, Reason] = {}
        self._atoms: dict[int, frozenset[int]] = {}
        self._number_of: dict[frozenset[int], int] = {}
        self._products_of: dict[int, list[int]] = {}
        self._bits: dict[str, int] = {}
        self.one = self.frozen(Reason("has a single position"))

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int) -> Ids:
        """New atoms.

        Args:
          count: how many.

        Returns:
          Their numbers, int32[count].
        """
        start = self._new(count, ATOM)
        return np.arange(start, start + count, dtype=np.int32)

    def frozen(self, reason: Reason) -> int:
        """The number of an empty set with a reason of its own."""
        number = self._new(1, FROZEN)
        self._reasons[number] = reason
        return number

    def kind(self, ids: Ids) -> np.ndarray:
        """FROZEN, ATOM or PRODUCT of each resolved set."""
        return self._kind[ids]

    def atoms(self, number: int) -> frozenset[int]:
        """The atoms of a resolved set."""
        kind = self._kind[number]
        if kind == ATOM:
            return frozenset((int(number),))
        return self._atoms[int(number)] if kind == PRODUCT else frozenset()

    def reason(self, number: int) -> Reason:
        """The reason of a frozen set."""
        return self._reasons[int(number)]

    def resolve(self, ids: Ids) -> Ids:
        """The sets that now stand at these positions.

        Args:
          ids: int32[n] numbers of sets.

        Returns:
          int32[n] numbers of sets of which no atom has been replaced.
        """
        while True:
            onward = self._next[ids]
            if np.array_equal(onward, ids):
                stale = ids[self._stale[ids]]
                if not stale.size:
                    return ids
                for product in np.unique(stale).tolist():
                    self._refresh(product)
                onward = self._next[ids]
            ids = onward

    def unify(self, first: Ids, second: Ids, reason: Reason) -> None:
        """Makes two axes survive together, position by position.

        Args:
          first: int32[n].
          second: int32[n].
          reason: what a position of one gets if that of the other is frozen or if they
            cannot be matched.
        """
        self._unify_frozen(first, second, reason)
        self._unify_frozen(second, first, reason)
        a, b = self._different(first, second)
        simple = (self._kind[a] == ATOM) & (self._kind[b] == ATOM)
        if simple.any():
            self._unify_atoms(a[simple], b[simple])
            a, b = self._different(first, second)
        if a.size and self._unify_products(a, b, reason):
            self._refine(first, second, reason)

    def join(self, *sets: int) -> int:
        """The number of the union of resolved sets, FROZEN ones left out."""
        union = frozenset().union(*(self.atoms(number) for number in sets))
        return self._intern(union, sets[0])

    def common(self, ids: Ids) -> int:
        """The number of the set of atoms that are in all of these resolved sets."""
        sets = [self.atoms(number) for number in np.unique(ids).tolist()]
        return self._intern(frozenset.intersection(*sets), ids[0])

    def freeze(self, ids: Ids, reason: Reason) -> None:
        """Freezes positions.

        Args:
          ids: int32[n].
          reason: why.
        """
        atoms = self._all_atoms(self.resolve(ids))
        if atoms.size:
            frozen = self.frozen(reason)
            self._bind(atoms, np.full(atoms.shape, frozen, np.int32))

    def flag(self, ids: Ids, name: str) -> None:
        """Gives the atoms at positions a flag; it stays with what replaces them."""
        bit = self._bits.setdefault(name, len(self._bits))
        self._flags[self._all_atoms(self.resolve(ids))] |= np.uint32(1 << bit)

    def flags(self, atoms: Ids) -> tuple[str, ...]:
        """The flags of any of these atoms, sorted."""
        bits = int(np.bitwise_or.reduce(self._flags[atoms])) if len(atoms) else 0
        return tuple(
            sorted(name for name, bit in self._bits.items() if bits >> bit & 1)
        )

    def expand(self, ids: Ids) -> tuple[np.ndarray, np.ndarray]:
        """The atoms of an axis.

        Args:
          ids: int32[n] resolved.

        Returns:
          The atoms and their positions, two int arrays with a row for each atom of each
          position, in the order of positions.
        """
        kind = self._kind[ids]
        single = np.flatnonzero(kind == ATOM)
        if not (kind == PRODUCT).any():
            return ids[single], single
        product = np.flatnonzero(kind == PRODUCT)
        sets = [sorted(self._atoms[number]) for number in ids[product].tolist()]
        atoms = np.concatenate(
            [ids[single], np.fromiter(itertools.chain(*sets), np.int32)]
        )
        positions = np.concatenate([single, np.repeat(product, [len(s) for s in sets])])
        order = np.argsort(positions, kind="stable")
        return atoms[order], positions[order]

    def alive(self, removed: Ids) -> np.ndarray:
        """Which sets survive when atoms are removed.

        Args:
          removed: the atoms.

        Returns:
          bool[len(self)]
        """
        alive = np.ones(self._count, bool)
        alive[removed] = False
        for atom in removed[self._inside[removed]].tolist():
            alive[self._products_of[atom]] = False
        return alive

    def _new(self, count: int, kind: int) -> int:
        start, self._count = self._count, self._count + count
        if self._count > self._kind.size:
            size = max(2 * self._kind.size, self._count)
            for name in ("_kind", "_next", "_flags", "_inside", "_stale"):
                old = getattr(self, name)
                setattr(
                    self,
                    name,
                    np.concatenate([old, np.zeros(size - old.size, old.dtype)]),
                )
        self._kind[start : self._count] = kind
        self._next[start : self._count] = np.arange(start, self._count)
        return start

    def _intern(self, atoms: frozenset[int], frozen: int) -> int:
        """The number of a set of atoms; of an empty one, that of a frozen set."""
        if not atoms:
            return int(frozen) if self._kind[frozen] == FROZEN else self.one
        if len(atoms) == 1:
            return next(iter(atoms))
        if atoms not in self._number_of:
            number = self._number_of[atoms] = self._new(1, PRODUCT)
            self._atoms[number] = atoms
            for atom in atoms:
                self._inside[atom] = True
                self._products_of.setdefault(atom, []).append(number)
        return self._number_of[atoms]

    def _bind(self, atoms: Ids, sets: Ids) -> None:
        """Puts resolved sets in the place of resolved, different atoms."""
        self._next[atoms] = sets
        kind = self._kind[sets]
        np.bitwise_or.at(
            self._flags, sets[kind == ATOM], self._flags[atoms[kind == ATOM]]
        )
        for atom, number in zip(
            atoms[kind == PRODUCT].tolist(), sets[kind == PRODUCT].tolist(), strict=True
        ):
            for part in self._atoms[number]:
                self._flags[part] |= self._flags[atom]
        for atom in atoms[self._inside[atoms]].tolist():
            self._stale[self._products_of[atom]] = True

    def _refresh(self, product: int) -> None:
        self._stale[product] = False
        if self._next[product] != product:
            return
        parts = self.resolve(np.fromiter(self._atoms[product], np.int32))
        self._next[product] = self.join(*parts.tolist())

    def _all_atoms(self, ids: Ids) -> Ids:
        kind = self._kind[ids]
        atoms = ids[kind == ATOM]
        products = np.unique(ids[kind == PRODUCT]).tolist()
        if products:
            parts = frozenset().union(*(self._atoms[number] for number in products))
            atoms = np.concatenate([atoms, np.fromiter(parts, np.int32)])
        return np.unique(atoms)

    def _different(self, first: Ids, second: Ids) -> tuple[Ids, Ids]:
        a, b = self.resolve(first), self.resolve(second)
        differ = a != b
        if differ.any():
            differ &= (self._kind[a] != FROZEN) | (self._kind[b] != FROZEN)
        return a[differ], b[differ]

    def _unify_frozen(self, first: Ids, second: Ids, reason: Reason) -> None:
        a, b = self._different(first, second)
        fixed = self._kind[b] == FROZEN
        if fixed.any():
            because = self._reasons[int(b[fixed][0])]
            self.freeze(a[fixed], dataclasses.replace(reason, because=because))

    def _unify_atoms(self, a: Ids, b: Ids) -> None:
        pairs = np.unique(np.stack([a, b]), axis=1)
        for atoms, sets in (pairs, pairs[::-1]):
            if np.unique(atoms).size == atoms.size and not np.isin(atoms, sets).any():
                return self._bind(atoms, sets)
        for pair in pairs.T:
            one, other = self.resolve(pair)
            if one != other:
                self._bind(np.array([one]), np.array([other]))
        return None

    def _unify_products(self, a: Ids, b: Ids, reason: Reason) -> bool:
        """Makes sets equal where a side comes down to one atom; whether some do not."""
        is_pending = False
        for pair in np.unique(np.stack([a, b]), axis=1).T:
            one, other = (self.atoms(number) for number in self.resolve(pair))
            left, right = one - other, other - one
            if not left and not right:
                continue
            if not left or not right:
                # Only frozen if the other has all of its atoms: it survives without it.
                self.freeze(np.fromiter(left | right, np.int32), reason)
            elif len(left) == 1:
                self._put(next(iter(left)), right)
            elif len(right) == 1:
                self._put(next(iter(right)), left)
            else:
                is_pending = True
        return is_pending

    def _put(self, atom: int, atoms: frozenset[int]) -> None:
        number = self._intern(atoms, self.one)
        self._bind(np.array([atom]), np.array([number]))

    def _refine(self, first: Ids, second: Ids, reason: Reason) -> None:
        """Writes two products over one mixed radix, the coarsest that refines both."""
        count = len(first)
        axes = [self.resolve(first), self.resolve(second)]
        cuts: list[int] = []
        for inner in range(2, count):
            divides = count % inner == 0 and all(inner % cut == 0 for cut in cuts)
            if divides and any(self._is_product(axis, inner) for axis in axes):
                cuts.append(inner)
        radix = [
            high // low for low, high in zip([1, *cuts], [*cuts, count], strict=True)
        ]
        parts = [self.fresh(size).tolist() for size in reversed(radix)]
        target = np.array(
            [self.join(*digits) for digits in itertools.product(*parts)], np.int32
        )
        for axis in axes:
            atoms, positions = self.expand(self.resolve(axis))
            for atom in np.unique(atoms).tolist():
                here = self.resolve(np.array([atom]))
                if here[0] != atom:
                    continue
                sets = self.resolve(target[positions[atoms == atom]])
                shared = frozenset.intersection(
                    *(self.atoms(number) for number in sets)
                )
                if shared - {atom}:
                    self._put(atom, shared - {atom})
                else:
                    self.freeze(here, reason)
        for axis in (first, second):
            a, b = self._different(axis, target)
            for one, other in zip(a, b, strict=True):
                left, right = self.atoms(one), self.atoms(other)
                self.freeze(np.fromiter(left ^ right, np.int32), reason)

    def _is_product(self, axis: Ids, inner: int) -> bool:
        """Whether an axis is rows x columns with `inner` columns."""
        grid = axis.reshape(-1, inner)
        rows = [self.atoms(self.common(row)) for row in grid]
        columns = [self.atoms(self.common(column)) for column in grid.T]
        return all(
            self.atoms(grid[i, j]) == rows[i] | columns[j]
            for i in range(len(rows))
            for j in range(len(columns))
        )
