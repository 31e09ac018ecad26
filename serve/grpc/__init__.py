"""The gRPC endpoint: service and messages of the Open Inference Protocol v2."""
