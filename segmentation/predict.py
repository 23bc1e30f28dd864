"""Draw the class of each pixel: python segmentation/predict.py CONFIG CHECKPOINT PICTURE... [--out FOLDER]"""

from mmseg.apis import inference_model

from metaformer.errors import run_command
from metaformer.mm.predict import predict

if __name__ == "__main__":
    run_command(
        lambda: predict("Draw the class of each pixel over pictures.", inference_model, "mmseg", with_labels=True)
    )
