"""One page that shows what a checkpoint makes of a catalogue, and which of the catalogue's own labels look wrong."""
