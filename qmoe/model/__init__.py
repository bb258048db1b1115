"""A model without its weights: its decoder layers, experts, routers and tensor names."""
