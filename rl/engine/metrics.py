"""What an engine is doing, for Prometheus: http://HOST:PORT/metrics, off unless `rollout.metrics_port` is set.

A scrape reads numbers that the engine counts anyway; it needs neither the engine's thread nor its device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "tessera_engine_"
log = logging.getLogger("tessera")


@dataclass(frozen=True)
class EngineState:
    """Counts since the engine was made, and how it is now."""

    generated_tokens: int
    finished_samples: int  # truncated ones included
    interrupted_samples: int  # taken from the engine before they were done
    running_samples: int
    waiting_samples: int
    pages: int  # of the cache
    pages_used: int
    weight_version: int | None  # None before the first weights


@dataclass(frozen=True)
class EngineCollector(Collector):
    engine: str
    state: Callable[[], EngineState]

    def collect(self) -> Iterator[Metric]:
        state = self.state()
        yield self._counter("generated_tokens", "tokens decoded; their rate is tokens a second", state.generated_tokens)
        yield self._counter("finished_samples", "samples that ended", state.finished_samples)
        yield self._counter("interrupted_samples", "samples taken away before they ended", state.interrupted_samples)
        yield self._gauge("running_samples", "samples in a slot", state.running_samples)
        yield self._gauge("waiting_samples", "samples that wait for a slot", state.waiting_samples)
        yield self._gauge("cache_pages", "pages of the KV cache", state.pages)
        yield self._gauge("cache_pages_used", "pages of the KV cache in use", state.pages_used)
        if state.weight_version is not None:
            yield self._gauge("weight_version", "version of the weights that generate", state.weight_version)

    def _counter(self, name: str, meaning: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, meaning, labels=("engine",))
        family.add_metric((self.engine,), value)
        return family

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, meaning, labels=("engine",))
        family.add_metric((self.engine,), value)
        return family


def serve_state(engine: str, state: Callable[[], EngineState], host: str, port: int) -> int | None:
    """Answers at host:port from a thread of its own, as long as the process lives; returns the port.

    Nobody's training ends for want of a scrape: a port that is taken is an error in the log, and None.
    """
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, state))
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        log.error("no metrics of %s at %s:%d (%s); choose another rollout.metrics_port", engine, host, port, error.strerror)
        return None
    log.info("metrics of %s at http://%s:%d/metrics", engine, host, server.server_port)
    return server.server_port
