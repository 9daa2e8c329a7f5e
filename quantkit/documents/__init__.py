"""The JSON documents that quantkit writes and reads back."""
