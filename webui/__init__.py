"""The web page: chat with any model of a controller, and see how fast and in how few steps it answers."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported: the page calls nobody
