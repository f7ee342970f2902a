"""Models: built on the meta device, then filled one module at a time."""
