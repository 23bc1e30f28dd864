"""Where models look: Grad-CAM maps of pictures, one row each, one column for each model (the paper's Figure 4)."""

from metaformer.analysis.gradcam import main
from metaformer.errors import run_command

if __name__ == "__main__":
    run_command(main)
