"""A checkpoint behind the OpenAI protocol."""
