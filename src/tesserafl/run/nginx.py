"""What nginx is told; `proxy.py` fills it in."""

CONFIGURATION = """\
# Written by `tessera certs`: devices reach the fleet path of a SuperLink that listens on loopback.
# Start it as the user that owns the keys:  nginx -p {runtime}/ -c FOLDER/nginx.conf -e stderr
daemon off;
pid {runtime}/nginx.pid;
error_log stderr warn;
worker_processes auto;
events {{ worker_connections 4096; }}

http {{
    access_log off;
    server_tokens off;
    default_type application/octet-stream;
    client_body_temp_path {runtime}/body;
    proxy_temp_path {runtime}/proxy;
    fastcgi_temp_path {runtime}/fastcgi;
    uwsgi_temp_path {runtime}/uwsgi;
    scgi_temp_path {runtime}/scgi;
    limit_conn_zone $binary_remote_addr zone=per_address:10m;

    upstream superlink {{
        server {superlink};
        keepalive 32;
        # Shorter than the 5 s of the SuperLink's server, or requests meet a connection that closes.
        keepalive_timeout 4s;
    }}

    server {{
        listen {listen} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.3;
        ssl_session_tickets off;

        # What is larger than its kind may be is refused unread.
        client_header_timeout 15s;
        client_body_timeout 60s;
        send_timeout 60s;
        keepalive_timeout 75s;
        # Many devices may share an address. 503 is tried again by a device, 403 and 429 are not.
        limit_conn per_address 256;
        limit_conn_status 503;
        merge_slashes off;

{locations}        location / {{ return 403; }}
    }}
}}
"""


LOCATION = """\
        # $uri is decoded and normalised, and can only be one of these. Arguments are dropped.
        location ~ ^/v1/fleet/(?:{paths})$ {{
            client_max_body_size {body};
            limit_except POST {{ deny all; }}
            proxy_pass https://superlink$uri;
            proxy_http_version 1.1;
            proxy_set_header Host localhost;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto https;
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_trusted_certificate {ca};
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_connect_timeout 5s;
            proxy_read_timeout 120s;
            # A request is read to its end before the SuperLink hears of it: no slow senders there.
            proxy_request_buffering on;
        }}
"""
