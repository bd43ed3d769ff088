#   docker build -t gateway .
#   docker run --read-only --tmpfs /tmp -p 8080:8080 -e GATEWAY_REDIS_URL=redis://redis:6379 gateway
#
# Both stages must have the same Python: a virtual environment belongs to the interpreter that made it. The embedded
# server's wheel needs glibc, so Alpine will not do.
ARG PYTHON=3.13-slim-bookworm

FROM python:${PYTHON} AS builder
# Extras of the package, with commas between: "langchain".
ARG EXTRAS=""
WORKDIR /src
# What the lock names, by its digests, so that an image of the same source is the same. What EXTRAS adds is not in the
# lock, but within the bounds of pyproject.toml. Without pip, which nothing needs at run time; and compiled now, since
# nobody may write there later.
COPY .ci/requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/gateway \
    && python -m pip --python /opt/gateway/bin/python install --compile --require-hashes -r requirements.lock
COPY pyproject.toml README.md ./
COPY gateway gateway
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip --python /opt/gateway/bin/python install --compile ".${EXTRAS:+[${EXTRAS}]}"

FROM python:${PYTHON}
ARG REVISION=""
LABEL org.opencontainers.image.title="LLM streaming gateway" \
      org.opencontainers.image.description="OpenAI's API in front, recorded token streams in Redis behind" \
      org.opencontainers.image.revision="${REVISION}"

# A number that stays, so that volumes keep their owner and Kubernetes can see that it is not root. /tmp is the only place
# that is written to: with a read-only root file system, mount a tmpfs there (the embedded server's socket and data).
RUN groupadd --gid 10001 gateway \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin gateway
COPY --from=builder /opt/gateway /opt/gateway
# The one path to mount a configuration over. Every key can be set by GATEWAY_<SECTION>_<KEY> as well, which beats the file.
COPY config.toml /etc/gateway/config.toml

# A loopback address would be out of reach from outside the container.
ENV PATH=/opt/gateway/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    GATEWAY_SERVER_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8080

# There is no curl in a slim image, and urllib.request would ask a proxy that is meant for the upstreams. The port of a
# mounted file is not known here: set GATEWAY_SERVER_PORT instead.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; probe = http.client.HTTPConnection('localhost', int(os.environ.get('GATEWAY_SERVER_PORT') or 8080), timeout=4); probe.request('GET', '/healthz'); sys.exit(probe.getresponse().status != 200)"]

# No shell in between: SIGTERM reaches the gateway itself. Flags can be added: docker run gateway --port 9000.
ENTRYPOINT ["gateway", "serve", "--config", "/etc/gateway/config.toml"]
