"""Devices over Flower, by its public API alone; needs `pip install 'tesserafl[flower]'`.

post.py    what the server app's grid is to `engines.remote`
client.py  the client app: a short process that hands messages to the device's resident
app/       the Flower app of both, three small files
"""
