"""The models for Hugging Face's tools."""

# Before any module here: registering them, which follows, imports them, and cannot while one of them is being
# imported itself.
import transformers  # noqa: F401
