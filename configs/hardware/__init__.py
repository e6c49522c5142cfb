"""What devices are made of, from their vendors' figures: one file a device."""
