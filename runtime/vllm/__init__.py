"""The bundle inside and between vLLM engines."""
