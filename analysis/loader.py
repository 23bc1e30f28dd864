"""Images per second of the training loader, of JPEG decoders alone and behind it, and where a picture's time goes."""

from metaformer.analysis.loader import main
from metaformer.errors import run_command

if __name__ == "__main__":
    run_command(main)
