"""An app for Flower, as its processes get it."""
