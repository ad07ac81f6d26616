"""Bundle → TensorRT engines: the graph rewritten for its plugins, the plugins, the checker, the builder."""
