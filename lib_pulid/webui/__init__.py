"""The extension's side of the WebUI: what it shows, reads, writes and keeps. Only this package imports gradio."""
