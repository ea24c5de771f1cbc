"""Build a TensorRT engine from an exported RF-DETR model.

    pip install tensorrt
    transformers-rfdetr export my-model my-model.onnx --dtype float16 --batch-size 1
    python build_tensorrt.py my-model.onnx my-model.engine

The network is strongly typed: TensorRT computes each layer in the data types of the file. A float16 file is float16
except for the prediction heads, the references and the sampling points, which overflow or lose boxes in half precision
and are float32 in it. A float32 file becomes a float32 engine (TF32 is disabled), an INT8 file one with INT8 layers.

We have not run this script on a GPU.
"""

import argparse
import sys
from pathlib import Path


def require_gpu():
    """Return the module tensorrt; exit with a message if it is not installed or there is no GPU."""
    try:
        import tensorrt
    except ImportError:
        sys.exit("build_tensorrt.py requires the package tensorrt. Run: pip install tensorrt")
    import torch

    if not torch.cuda.is_available():
        sys.exit("build_tensorrt.py requires an NVIDIA GPU: an engine is built for the GPU that it will run on.")
    return tensorrt


def build(trt, path, batch_sizes, workspace):
    """Return the serialized engine of an ONNX file.

    Args:
        trt: The module tensorrt.
        path: The ONNX file.
        batch_sizes: Smallest, most frequent and largest batch size of a file for any batch size.
        workspace: Largest temporary memory of a layer in GiB.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # From TensorRT 11 on, every network is strongly typed and the flag is gone.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = "\n".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        sys.exit(f"TensorRT cannot read {path}:\n{errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace * 2**30))
    config.clear_flag(trt.BuilderFlag.TF32)
    pixels = network.get_input(0)
    if pixels.shape[0] == -1:
        profile = builder.create_optimization_profile()
        profile.set_shape(pixels.name, *((size, *pixels.shape[1:]) for size in batch_sizes))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        sys.exit(f"TensorRT built no engine from {path}; its messages above say why.")
    return engine


def main():
    """Run the command."""
    parser = argparse.ArgumentParser(description="Build a TensorRT engine from an exported RF-DETR model.")
    parser.add_argument("model", type=Path, help="an .onnx file written by `transformers-rfdetr export`")
    parser.add_argument("engine", type=Path, help="the new file")
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs=3,
        default=(1, 1, 8),
        metavar=("MIN", "OPT", "MAX"),
        help="batch sizes of a file for any batch size (default: 1 1 8)",
    )
    parser.add_argument("--workspace", type=float, default=4, help="memory of a layer in GiB (default: %(default)g)")
    options = parser.parse_args()
    if not options.model.is_file():
        sys.exit(f"{options.model} must exist. Export a model with `transformers-rfdetr export`.")
    if options.engine.exists():
        sys.exit(f"{options.engine} must be new. Give another name, or remove the file.")
    trt = require_gpu()
    options.engine.write_bytes(build(trt, options.model, options.batch_sizes, options.workspace))
    print(f"{options.engine}: {options.engine.stat().st_size / 1e6:.1f} MB, TensorRT {trt.__version__}")


if __name__ == "__main__":
    main()
