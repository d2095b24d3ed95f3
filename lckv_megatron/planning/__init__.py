"""What a run would be, computed from its settings."""
