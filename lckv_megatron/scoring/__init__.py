"""How well models predict texts, and answer the questions of a benchmark."""
