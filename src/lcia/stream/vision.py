"""The built-in stream `vision`: seven small image tasks in the shapes of multimodal instruction tuning."""

from __future__ import annotations

from lcia.stream.task_source import Found, TaskSource, data_folder, share

# Task → scorer, in the order in which they arrive.
SCORER_OF = {
    "eurosat_mcq": "option_letter",
    "clothing_cls": "exact",
    "coco_vqa": "vqa_short",
    "bccd_ground": "box_iou",
    "sroie_ocr": "ocr",
    "nlvr_tf": "true_false",
}
ON_REQUEST = {"coco_ground": "box_iou"}


def vision(*, path: str | None = None, dev_share: float = 0.1) -> Found:
    """EuroSAT, clothing-dataset-small, COCO, BCCD, SROIE and NLVR as instruction data; coco_ground comes on request.

    Args:
        path: the folder with a folder for each task; `$LCIA_DATA/vision` or `$LCIA_DATA/vision_stream` if not given.
        dev_share: of the training rows that become dev rows, whole images at a time: the data have train and test only.
    """
    data = data_folder("vision", path, names=("vision", "vision_stream"))
    share_of_train = share("vision", dev_share)

    def source(name: str, scorer: str) -> TaskSource:
        files = ((data / name / "data.jsonl", None),)
        return TaskSource(name, files, scorer=scorer, image_folders=(data,), dev_share=share_of_train)

    return Found(
        "vision",
        tuple(source(*entry) for entry in SCORER_OF.items()),
        on_request=tuple(source(*entry) for entry in ON_REQUEST.items()),
    )
