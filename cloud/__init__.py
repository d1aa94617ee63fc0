"""The fleet's side: training, collector, store, and the API over them."""
