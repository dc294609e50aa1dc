"""One harness for all experiments: data, models, training, records, pages, figures."""
