"""Real classes of devices and links, each with where its figures are from.

`gflops` is what training reaches, not a peak: nets of few products reach 2 % of it, others half.
What was measured and what is our estimate stands behind each figure (m, e); sources and how the
figures were derived are in docs/howto/fleets.md. A fleet file overrides any of them.
"""

from __future__ import annotations

from tesserafl.engines.device import Device, Link

LINKS: dict[str, Link] = {
    "ethernet": Link(up_mbps=941, down_mbps=941, latency_ms=0.15),  # m: iperf3; e
    "wifi": Link(up_mbps=100, down_mbps=150, latency_ms=1.5),  # e; m; e
    "broadband": Link(up_mbps=52.8, down_mbps=97.6, latency_ms=4.5),  # m: world medians, 2025
    "4g": Link(up_mbps=8, down_mbps=30, latency_ms=22.5),  # e, within national medians
    "5g": Link(up_mbps=21, down_mbps=203, latency_ms=12.5),  # m: medians, 2021 and 2023; e
    "fibre": Link(up_mbps=1000, down_mbps=1000, latency_ms=7.5),  # e; m: a country's backbone
    "overseas": Link(up_mbps=200, down_mbps=200, latency_ms=70),  # e; m: Tokyo-Dallas
    # e, after Hwamei's edges abroad: more than a minute for 10 MB
    "overseas-congested": Link(up_mbps=1.2, down_mbps=1.2, latency_ms=120),
}

PROFILES: dict[str, Device] = {
    "raspberry-pi-4": Device(
        profile="raspberry-pi-4",
        gflops=15.8,  # m: ResNet-18, batches of 16
        memory_mib=4096,
        link=LINKS["wifi"],
        idle_watts=3.0,  # m
        busy_watts=6.5,  # m
        radio_watts=3.5,  # e
    ),
    "raspberry-pi-5": Device(
        profile="raspberry-pi-5",
        gflops=29.6,  # m: ResNet-18, batches of 16
        memory_mib=8192,
        link=LINKS["wifi"],
        idle_watts=3.3,  # m
        busy_watts=12.0,  # m
        radio_watts=3.9,  # e
    ),
    "jetson-nano": Device(
        profile="jetson-nano",
        gflops=60.0,  # e: a quarter of the peak of 236
        memory_mib=3964,
        link=LINKS["ethernet"],
        idle_watts=2.0,  # e
        busy_watts=10.0,  # its power mode's budget
        radio_watts=2.5,  # e
    ),
    "jetson-orin-nano": Device(
        profile="jetson-orin-nano",
        gflops=330.0,  # e: a quarter of the 1,310 of a matrix product (m)
        memory_mib=7618,
        link=LINKS["ethernet"],
        idle_watts=5.2,  # m
        busy_watts=14.6,  # m
        radio_watts=5.7,  # e
    ),
    "phone": Device(
        profile="phone",
        gflops=30.0,  # e: a fifth of the peak of 140 to 160 (m)
        memory_mib=8192,
        link=LINKS["4g"],
        idle_watts=0.65,  # m
        busy_watts=3.5,  # e, between 2.2 and 3.9 (m)
        radio_watts=1.5,  # e
    ),
    "phone-flagship": Device(
        profile="phone-flagship",
        gflops=50.0,  # e: a fifth of the peak of 250
        memory_mib=12288,
        link=LINKS["5g"],
        idle_watts=1.25,  # m
        busy_watts=5.7,  # m
        radio_watts=2.3,  # e
    ),
    "laptop": Device(
        profile="laptop",
        gflops=140.0,  # e: a quarter of the 560 of a matrix product (m)
        memory_mib=16384,
        link=LINKS["wifi"],
        idle_watts=8.0,  # e
        busy_watts=42.0,  # m: another laptop of this class
        radio_watts=9.0,  # e
    ),
    "server-cpu": Device(
        profile="server-cpu",
        gflops=170.0,  # e: a quarter of the 664 of a matrix product (m, 32 cores of Arm)
        memory_mib=131072,
        link=LINKS["ethernet"],
        idle_watts=50.0,  # m
        busy_watts=100.0,  # m
        radio_watts=52.0,  # e
    ),
    "server-gpu": Device(
        profile="server-gpu",
        gflops=4800.0,  # e: a quarter of the 19,180 of a matrix product on an A100 (m)
        memory_mib=76294,
        link=LINKS["ethernet"],
        idle_watts=80.0,  # m
        busy_watts=275.0,  # e, its limit is 400
        radio_watts=85.0,  # e
    ),
}
