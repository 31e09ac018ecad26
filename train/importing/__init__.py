"""Import of models that another library trained: their ONNX graph, and a bundle around it."""
