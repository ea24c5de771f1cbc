"""Find objects in an image with an exported RF-DETR model, using onnxruntime, numpy and Pillow, without PyTorch.

    pip install onnxruntime numpy pillow
    python predict_onnx.py model.onnx street.jpg --threshold 0.5 --output overlay.png

The preprocessing and the class names are read from the model file.
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

COLORS = [(230, 60, 60), (60, 140, 240), (60, 180, 90), (240, 170, 40), (160, 90, 220), (40, 190, 190)]


def bilinear_taps(source, target):
    """Return for each of `target` pixels the two nearest of `source` pixels, and the weight of the second."""
    position = (np.arange(target, dtype=np.float32) + 0.5) * np.float32(source / target) - 0.5
    position = np.maximum(position, 0)
    low = np.minimum(position.astype(int), source - 1)
    return low, np.minimum(low + 1, source - 1), (position - low).astype(np.float32)


def resize(planes, height, width):
    """Resize (N, H, W) to (N, height, width): bilinear around pixel centers, without antialiasing."""
    low, high, weight = bilinear_taps(planes.shape[1], height)
    planes = planes[:, low] * (1 - weight)[:, None] + planes[:, high] * weight[:, None]
    low, high, weight = bilinear_taps(planes.shape[2], width)
    return planes[..., low] * (1 - weight) + planes[..., high] * weight


def prepare(image, metadata):
    """Scale, resize and normalize an RGB image -> (1, 3, height, width) float32."""
    planes = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(1 / metadata["rescale_factor"])
    planes = resize(planes, *metadata["resolution"])
    mean, std = (np.array(metadata[name], np.float32)[:, None, None] for name in ("image_mean", "image_std"))
    return ((planes - mean) / std)[None]


def best_pairs(boxes, logits, masks=None):
    """Return the Q best pairs of query and class, best first, of boxes (Q, 4), logits (Q, C) and masks (Q, h, w)."""
    num_queries, num_classes = logits.shape
    scores = (0.5 + 0.5 * np.tanh(0.5 * logits)).ravel()  # the sigmoid
    best = np.argsort(-scores, kind="stable")[:num_queries]
    queries, labels = np.divmod(best, num_classes)
    center, half = boxes[queries, :2], np.maximum(boxes[queries, 2:], 0) / 2
    corners = np.concatenate([center - half, center + half], axis=1).clip(0, 1)
    return scores[best], labels, corners, None if masks is None else masks[queries]


def predict(session, image, threshold):
    """Return scores (N,), labels (N,), boxes (N, 4) as x0, y0, x1, y1 in pixels, and masks (N, H, W) or None."""
    metadata = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    pixels = prepare(image, metadata)
    batch_size = session.get_inputs()[0].shape[0]
    if isinstance(batch_size, int):  # exported with a fixed batch size
        pixels = np.repeat(pixels, batch_size, axis=0)
    values = session.run(metadata["outputs"], {"pixel_values": pixels})
    outputs = {name: value[0] for name, value in zip(metadata["outputs"], values, strict=True)}
    if "logits" in outputs:
        scores, labels, boxes, masks = best_pairs(**outputs)
    else:
        scores, labels, boxes, masks = (outputs.get(name) for name in ("scores", "labels", "boxes", "masks"))
    keep = scores > threshold
    if masks is not None:
        masks = resize(masks[keep], image.height, image.width) > 0
    return scores[keep], labels[keep], boxes[keep] * np.tile(image.size, 2), masks


def draw(image, boxes, masks):
    """Return the image with tinted masks and box outlines."""
    pixels = np.array(image)
    for index, mask in enumerate(() if masks is None else masks):
        pixels[mask] = pixels[mask] // 2 + np.array(COLORS[index % len(COLORS)], np.uint8) // 2
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    for index, box in enumerate(boxes):
        pen.rectangle(tuple(box), outline=COLORS[index % len(COLORS)], width=2)
    return drawn


def main():
    """Run the command."""
    parser = argparse.ArgumentParser(description="Find objects in an image with an exported RF-DETR model.")
    parser.add_argument("model", help="an .onnx file written by `transformers-rfdetr export`")
    parser.add_argument("image", help="an image with 8 bits per channel")
    parser.add_argument("--threshold", type=float, default=0.5, help="minimum score, 0 to 1 (default: %(default)s)")
    parser.add_argument("--output", default="overlay.png", help="image file to write (default: %(default)s)")
    options = parser.parse_args()

    onnxruntime.set_default_logger_severity(3)  # errors only
    session = onnxruntime.InferenceSession(options.model, providers=["CPUExecutionProvider"])
    class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    image = ImageOps.exif_transpose(Image.open(options.image)).convert("RGB")
    scores, labels, boxes, masks = predict(session, image, options.threshold)
    for index, (score, label, box) in enumerate(zip(scores, labels, boxes, strict=True)):
        area = "" if masks is None else f"  {masks[index].sum():8} pixels"
        print(f"{class_names[str(label)]:<16} {score:.3f} ", *(f"{side:7.1f}" for side in box), area)
    draw(image, boxes, masks).save(options.output)
    print(f"{len(scores)} objects with a score above {options.threshold:g}; wrote {options.output}")


if __name__ == "__main__":
    main()
