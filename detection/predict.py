"""Boxes and masks drawn into pictures: python detection/predict.py CONFIG CHECKPOINT PICTURE... [--out FOLDER]"""

from mmdet.apis import inference_detector

from metaformer.errors import run_command
from metaformer.mm.predict import predict

if __name__ == "__main__":
    run_command(lambda: predict(inference_detector, drawing={"pred_score_thr": 0.3}))
