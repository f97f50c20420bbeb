"""Open-vocabulary detection: a head on the model's own picture encoder, its data and its training."""
