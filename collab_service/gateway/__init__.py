"""The JSON gateway: HTTP calls translated into gRPC calls. Knows the client, and nothing else of the service."""
