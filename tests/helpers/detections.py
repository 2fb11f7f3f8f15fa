"""Makes, compares and reads detections in COCO's results format."""

import numpy as np


def result(box, score, image_id=1, category_id=3):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def ordered(results):
    results = sorted(results, key=lambda r: (str(r["image_id"]), r["category_id"], -r["score"]))
    return [(r["image_id"], r["category_id"]) for r in results], np.array(
        [[*r["bbox"], r["score"]] for r in results]
    ).reshape(-1, 5)


def assert_same(ours, expected):
    (keys, values), (expected_keys, expected_values) = ordered(ours), ordered(expected)
    assert keys == expected_keys
    np.testing.assert_allclose(values, expected_values, atol=2e-4)


def read_table(text):
    """Returns the rows of the Markdown table by their first cell."""
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows[2:]}
