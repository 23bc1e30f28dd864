"""Draw boxes and masks into pictures: python detection/predict.py CONFIG CHECKPOINT PICTURE... [--out FOLDER]"""

from mmdet.apis import inference_detector

from metaformer.errors import run_command
from metaformer.mm.predict import predict

if __name__ == "__main__":
    description = "Draw the boxes and masks that a detector finds with a score above 0.3 into pictures."
    run_command(lambda: predict(description, inference_detector, "mmdet", pred_score_thr=0.3))
