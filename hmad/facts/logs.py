"""How every module logs: a constant event and named fields, through the standard library's loggers.

``log = get_logger(__name__)``, then ``log.info("session opened", peer=name)``. What becomes of a line is for
``hmad.edges.logs`` to say; until that is asked, and in tests, these are ordinary log records that carry the fields.
"""

import logging

import structlog


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose keyword arguments become fields. A LogRecord's own (name, module, ...) cannot."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_args_and_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return logger
