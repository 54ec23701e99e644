"""The probe: a small multimodal model that really sees, and what measures its quality."""
