"""Values that all layers share. No torch, no input or output."""
