"""Draw the images of the README with rf-detr-seg-tiny: `python examples/draw_readme_images.py docs/images`"""

import sys
import tempfile
from pathlib import Path

from transformers_rfdetr import InstanceDataset, load, predict, predict_tiled, predict_video
from transformers_rfdetr.data.drawing import draw_annotations, draw_grid
from transformers_rfdetr.data.synthetic import draw_dataset, draw_scene
from transformers_rfdetr.inference.video.writer import VideoWriter

_SEED = 2_000_000  # an image that the model was not trained on
_SIDE = 288
_METRES_PER_PIXEL = 0.1  # at the model's 144 pixels, 0.2


def main(output: str) -> None:
    """Draw the images into the folder `output`."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = load("rf-detr-seg-tiny")

    [image], coco = draw_dataset(1, (_SIDE, _SIDE), metres_per_pixel=_METRES_PER_PIXEL, first_seed=_SEED)
    [found] = predict(model, processor, image)
    found.draw(image).save(folder / "image.png")
    [sample] = InstanceDataset(coco, [image])
    ground_truth = draw_annotations(image, sample["annotations"], model.config.id2label)
    draw_grid([[ground_truth, found.draw(image)]], ["ground truth", "predicted"]).save(folder / "comparison.png")

    town, _ = draw_scene(_SEED + 1, (384, 512), metres_per_pixel=0.25)
    predict_tiled(model, processor, town, overlap=0.3).draw(town, color_by="instance").save(folder / "tiles.png")

    street, _ = draw_scene(_SEED + 2, (_SIDE, 2 * _SIDE), metres_per_pixel=_METRES_PER_PIXEL)
    with tempfile.TemporaryDirectory() as temporary:
        flight = Path(temporary) / "flight.mp4"
        with VideoWriter(flight, 10, (_SIDE, _SIDE)) as video:
            for step in range(30):
                video.write(street.crop((8 * step, 0, 8 * step + _SIDE, _SIDE)), step / 10)
        frames = []
        predict_video(
            model,
            processor,
            flight,
            Path(temporary) / "found.mp4",
            track=True,
            on_frame=lambda frame, found, drawn: frames.append(drawn),
        )
        frames[20].save(folder / "video.png")


if __name__ == "__main__":
    main(sys.argv[1])
