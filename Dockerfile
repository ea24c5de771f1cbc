# A page on which a model is tried, and the answers of an Inference Endpoint (POST to /predict), on the CPU:
#   pip wheel . --no-deps --wheel-dir dist && docker build --tag rfdetr .
#   docker run --publish 7860:7860 rfdetr app rf-detr-seg-medium
#   docker run --publish 7860:7860 --volume ./my-model:/model rfdetr app /model    # or /model/my-model.onnx
FROM python:3.12-slim
COPY dist/transformers_rfdetr-*.whl /wheels/
# The default wheel of PyTorch contains CUDA.
RUN python -m pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
RUN python -m pip install --no-cache-dir "$(ls /wheels/*.whl)[app]" onnxruntime
ENV GRADIO_SERVER_NAME=0.0.0.0 HF_HOME=/tmp/huggingface
USER 1000
EXPOSE 7860
ENTRYPOINT ["transformers-rfdetr"]
CMD ["app", "rf-detr-seg-tiny"]
