"""Networks by name; each takes a task and an image shape and returns logits."""
