"""Robot policies over a websocket: server, clients, and the buffers of the control loop."""
