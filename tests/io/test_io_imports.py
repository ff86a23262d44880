"""engine.io works without torch, and does not bring it in."""

import subprocess
import sys

CODE = """
import sys
sys.modules["torch"] = None  # importing it now fails
import engine.io.checkpoint, engine.io.hub, engine.io.text, engine.models.nemotron.config
assert "huggingface_hub" not in sys.modules and "pickle" not in vars(engine.io.checkpoint)
"""


def test_no_torch_and_no_hub_client_on_import():
    subprocess.run([sys.executable, "-c", CODE], check=True)
