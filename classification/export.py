"""Export a trained model, or its backbone, to ONNX or torch.export; the file is compared with the model."""

from metaformer.errors import run_command
from metaformer.export import main

if __name__ == "__main__":
    run_command(main)
