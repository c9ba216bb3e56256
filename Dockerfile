# A small image that runs without root and on a read-only root file system. How to run it: docs/deployment.md.
FROM debian:bookworm-slim AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN python3 -m venv /opt/dmz-relay \
 && /opt/dmz-relay/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock
COPY relay ./relay
# hatchling builds the wheel in an environment of its own.
RUN /opt/dmz-relay/bin/pip install --no-cache-dir --no-deps . \
 && /opt/dmz-relay/bin/pip uninstall -y pip setuptools

FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --system --gid 5025 relay \
 && useradd --system --uid 5025 --gid 5025 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin relay \
 && install -d -o relay -g relay -m 0750 /var/spool/dmz-relay \
 && install -d -m 0755 /etc/dmz-relay
COPY --from=build /opt/dmz-relay /opt/dmz-relay
ENV PATH=/opt/dmz-relay/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER relay
VOLUME /var/spool/dmz-relay
EXPOSE 25 587 465 9125
STOPSIGNAL SIGTERM
# web.listen has to be 127.0.0.1:9125 or 0.0.0.0:9125 for this.
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9125/readyz', timeout=4)"]
ENTRYPOINT ["relay"]
CMD ["serve", "--config", "/etc/dmz-relay/relay.toml"]
