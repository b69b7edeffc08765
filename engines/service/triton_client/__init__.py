"""Sends images to a Triton server and gets the encoder's features: an example to run, read and copy.

The folder imports nothing of this project, so a copy of it works wherever numpy, Pillow and tritonclient are:

    pip install numpy pillow 'tritonclient[http,grpc]'
    python -m triton_client image.jpg --url localhost:8000 --save features.npz
"""
