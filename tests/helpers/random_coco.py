"""Makes random COCO sets and results with crowds, ties and empty images."""

import numpy as np
import pycocotools.mask as mask_util

WIDTH, HEIGHT, KEYPOINTS = 300, 200, 17


def outline(rng, box):
    """Returns the outline of a random shape in the box, as one polygon."""
    x, y, w, h = box
    angles = np.sort(rng.random(rng.integers(3, 8))) * 2 * np.pi
    points = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], 1)
    return points.ravel().round(2).tolist()


def to_rle(polygon):
    rle = mask_util.merge(mask_util.frPyObjects([polygon], HEIGHT, WIDTH))
    return rle | {"counts": rle["counts"].decode()}


def uncompressed(polygon):
    """Returns the mask as COCO has it for crowds: a list of run lengths."""
    pixels = mask_util.decode(to_rle(polygon)).flatten(order="F").astype(int)
    ends = np.flatnonzero(np.diff(pixels, prepend=0, append=-1))
    return {"counts": np.diff(ends, prepend=0).tolist(), "size": [HEIGHT, WIDTH]}


def random_coco(seed, task, first_id=1):
    """Returns a COCO json and results of a detector on it.

    Args:
        seed: decides everything.
        task: "bbox", "segm" or "keypoints".
        first_id: the first annotation's.
    """
    rng = np.random.default_rng(seed)
    names = [str(i) for i in range(KEYPOINTS)]
    categories = [{"id": int(i), "name": f"class {i}", "keypoints": names, "skeleton": []}
                  for i in rng.permutation(20)[: rng.integers(1, 4)] + 1]  # fmt: skip
    images = [{"id": int(i), "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.png"}
              for i in rng.permutation(50)[: rng.integers(1, 7)] + 1]  # fmt: skip
    labels = [category["id"] for category in categories]
    annotations, results = [], []

    def add_result(image, label, box, points=None):
        score = rng.choice([round(rng.random(), 1), rng.random(), 0.5])
        result = {"image_id": image["id"], "category_id": int(label), "score": float(score)}
        result["bbox"] = list(map(float, box))
        if task == "segm":
            result["segmentation"] = to_rle(outline(rng, box))
        if task == "keypoints":
            if points is None:
                points = rng.uniform(0, HEIGHT, (KEYPOINTS, 2))
            result["keypoints"] = np.c_[points, np.ones(KEYPOINTS)].ravel().tolist()
        results.append(result)

    for image in images:
        for _ in range(rng.integers(0, 12)):  # some images are empty
            size = np.minimum(rng.choice([3, 20, 40, 100, 190], 2) * rng.uniform(0.3, 1, 2), 190)
            place = rng.uniform(0, np.array([WIDTH, HEIGHT]) - size)
            box = np.concatenate([place, size])
            if rng.random() < 0.5:
                box = np.maximum(np.round(box), [0, 0, 1, 1])
            area = float(rng.choice([box[2] * box[3], box[2] * box[3] * 0.7, 32.0**2, 96.0**2]))
            row = {"id": first_id + len(annotations), "image_id": image["id"], "area": area,
                   "category_id": int(rng.choice(labels)), "bbox": box.tolist(),
                   "iscrowd": int(rng.random() < 0.2)}  # fmt: skip
            if rng.random() < 0.1:
                row["ignore"] = 1
            if task == "segm":
                polygon = outline(rng, box)
                row["segmentation"] = uncompressed(polygon) if row["iscrowd"] else [polygon]
            points = box[:2] + rng.random((KEYPOINTS, 2)) * box[2:]
            if task == "keypoints":
                seen = rng.integers(0, 3, KEYPOINTS) * (rng.random() < 0.9)
                row["keypoints"] = (np.c_[points, seen] * (seen > 0)[:, None]).ravel().tolist()
                row["num_keypoints"] = int((seen > 0).sum())
            annotations.append(row)
            for _ in range(rng.integers(0, 4)):
                noise = rng.choice([0, 0.02, 0.1, 0.3])
                near = box + rng.normal(0, noise, 4) * box[[2, 3, 2, 3]]
                label = row["category_id"] if rng.random() < 0.85 else rng.choice(labels)
                add_result(image, label, np.maximum(near, [-9, -9, 0.5, 0.5]),
                           points + rng.normal(0, 1, points.shape) * noise * box[2])  # fmt: skip
    if rng.random() < 0.15:  # more than COCO's 100 per image
        for _ in range(120):
            corner, size = rng.uniform(0, 100, 2), rng.uniform(1, 90, 2)
            add_result(images[0], labels[0], np.concatenate([corner, size]))
    if rng.random() < 0.1 and task != "keypoints":  # in Detectron2 those need an object
        annotations = []
    results = [results[i] for i in rng.permutation(len(results))]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    return content, results
