"""A trained network as a file for other programs, and its model card."""

import importlib.util
import io
import warnings
from pathlib import Path

import torch

from dataset import SIDE
from training.checkpoint import training_caveat
from training.console import UserError
from training.files import write_atomic

PT2_CODE = """import torch
model = torch.export.load({name!r}).module()
digits, sums = model(torch.from_numpy(pixels), torch.from_numpy(addends))"""
ONNX_CODE = """import onnxruntime
session = onnxruntime.InferenceSession({name!r})
digits, sums = session.run(None, {{"pixels": pixels, "addend": addends}})"""
FORMATS = {".pt2": PT2_CODE, ".onnx": ONNX_CODE}  # by suffix: code for the model card


def export(path, predictor, checkpoint):
    """Write a `Predictor`, in the format of the suffix, and its model card; returns both paths."""
    batch = {0: torch.export.Dim("batch")}  # any size
    example = torch.zeros(2, SIDE, SIDE).byte(), torch.zeros(2).long()
    program = torch.export.export(predictor, example, dynamic_shapes=(batch, batch))
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # contains paths of this machine
    content = io.BytesIO()
    if path.suffix == ".onnx":
        content.write(as_onnx(program))
    else:
        torch.export.save(program, content)
    write_atomic(path, content.getbuffer())
    card_path = path.with_name(f"{path.name}.md")
    card = model_card(path, predictor, checkpoint)
    write_atomic(card_path, card.encode(errors="backslashreplace"))
    return path, card_path


def as_onnx(program):
    """The content of an .onnx file, in bytes. Raises UserError if the exporter is unavailable."""
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise UserError("exporting to .onnx needs two packages: pip install onnx onnxscript")
    import onnx

    options = {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: "batch"}, {0: "batch"})}
    options["input_names"] = "pixels", "addend"
    options["output_names"] = "digit_probabilities", "sum_probabilities"
    try:
        with warnings.catch_warnings(action="ignore"):
            exported = torch.onnx.export(program, **options)
    except torch.onnx.OnnxExporterError as error:
        message = f"torch {torch.__version__} cannot export to .onnx; install a newer version"
        raise UserError(message) from error
    model = exported.model_proto  # torch always writes IR version 10, which older runtimes refuse
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    return model.SerializeToString()


def model_card(path, predictor, checkpoint):
    """The model card of an exported network, in Markdown."""
    template = Path(__file__).with_name("model_card.md").read_text("utf-8")
    values = checkpoint["flags"] | checkpoint["recipe"] | checkpoint["history"][-1]
    values["data"] = training_caveat(checkpoint["flags"]) or "MNIST"
    values["parameters"] = sum(p.numel() for p in predictor.parameters())
    code = FORMATS[path.suffix].format(name=path.name)
    return template.format(name=path.name, code=code, **values)
