"""The universal checkpoint: written without a layout, read under any. Import the modules; nothing is imported here."""
