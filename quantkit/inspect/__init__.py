"""What a checkpoint on the disk holds, from its headers."""
