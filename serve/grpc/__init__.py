"""The gRPC endpoint: the Open Inference Protocol's service and its messages."""
