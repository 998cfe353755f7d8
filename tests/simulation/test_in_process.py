"""The in-process grid behaves like Flower's: serialiser, node ids, state, error replies."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from simulations.in_process import InProcessGrid, node_id_of, run_in_process


def build_client_app() -> ClientApp:
    """A client that adds its partition id to the arrays and counts its own messages."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = context.node_config["partition-id"]
        if message.content.config_records.get("settings", {}).get("fail") == partition:
            context.state["leak"] = ConfigRecord({"x": 1})
            raise RuntimeError("no such column")
        calls = context.state.config_records.get("calls", ConfigRecord({"num": 0}))["num"] + 1
        context.state["calls"] = ConfigRecord({"num": calls})
        name = next(iter(message.content.array_records))
        arrays = message.content.array_records[name].to_numpy_ndarrays()
        shifted = ArrayRecord([array + partition for array in arrays])
        metrics = MetricRecord({"num-examples": 1, "calls": calls})
        return Message(RecordDict({"arrays": shifted, "metrics": metrics}), reply_to=message)

    @app.query("echo")
    def echo(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return app


def build_grid(*, num_clients=3, on_reply=None, client_app=None) -> InProcessGrid:
    app = client_app or build_client_app()
    return InProcessGrid(app, run_config={"seed": 7}, num_clients=num_clients, on_reply=on_reply)


def train_messages(grid: InProcessGrid, settings: dict | None = None) -> list[Message]:
    content = RecordDict({"arrays": ArrayRecord([np.zeros(4, np.float16)]), "settings": ConfigRecord(settings or {})})
    return [Message(content, node_id, "train", group_id="1") for node_id in grid.get_node_ids()]


def test_flower_strategy_runs_and_averages_by_hand():
    final = {}
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        assert context.run_config["num-server-rounds"] == 2
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=3, min_train_nodes=3)
        result = strategy.start(grid, ArrayRecord([np.zeros(2, np.float32)]), num_rounds=2)
        final["arrays"] = result.arrays.to_numpy_ndarrays()

    grid = run_in_process(server_app, build_client_app(), run_config={"num-server-rounds": 2}, num_clients=3)
    # Each round adds the mean of the partition ids, (0 + 1 + 2) / 3.
    np.testing.assert_array_equal(final["arrays"][0], np.full(2, 2.0, np.float32))
    assert grid.num_messages == {"train": 6}
    assert grid.num_error_replies["train"] == 0


def test_server_exceptions_propagate():
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        raise KeyError("seed")

    with pytest.raises(KeyError, match="seed"):
        run_in_process(server_app, build_client_app(), run_config={}, num_clients=1)


def test_replies_come_one_per_pull():
    grid = build_grid()
    message_ids = grid.push_messages(train_messages(grid))
    sources = []
    for _ in message_ids:
        (reply,) = grid.pull_messages(message_ids)
        assert reply.metadata.reply_to_message_id == message_ids[len(sources)]
        sources.append(reply.metadata.src_node_id)
    assert sources == grid.get_node_ids()
    assert list(grid.pull_messages(message_ids)) == []


def test_only_requested_messages_run():
    grid = build_grid()
    first, second, _ = grid.push_messages(train_messages(grid))
    (reply,) = grid.pull_messages([second])
    assert reply.metadata.reply_to_message_id == second
    (reply,) = grid.pull_messages([first])
    assert reply.metadata.reply_to_message_id == first


def test_pushed_messages_carry_their_ids():
    grid = build_grid()
    messages = train_messages(grid)
    assert grid.push_messages(messages) == [message.metadata.message_id for message in messages]


def test_client_gets_its_own_copy():
    def add_one(message: Message, context: Context) -> Message:
        message.content.array_records["arrays"]["0"] = Array(np.ones(4, np.float16))
        return Message(message.content, reply_to=message)

    app = ClientApp()
    app.train()(add_one)
    grid = build_grid(client_app=app)
    messages = train_messages(grid)
    grid.send_and_receive(messages)
    assert messages[0].content.array_records["arrays"].to_numpy_ndarrays()[0].sum() == 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "int16", "uint8", "int64", "bool"])
def test_arrays_keep_dtype_shape_and_bytes(dtype):
    grid = build_grid(num_clients=1)
    arrays = {"empty": np.zeros((0, 3), dtype), "scalar": np.ones((), dtype), "big": np.ones((3, 5), dtype)}
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    (reply,) = grid.send_and_receive([Message(RecordDict({"a": record}), grid.get_node_ids()[0], "query.echo")])
    for name, array in arrays.items():
        received = reply.content.array_records["a"][name].numpy()
        assert received.dtype == array.dtype
        assert received.shape == array.shape
        np.testing.assert_array_equal(received, array)


def test_bytes_are_counted_by_direction_and_type():
    grid = build_grid(num_clients=2)
    payload = np.random.default_rng(0).standard_normal(500_000).astype(np.float32)  # 2 MB, incompressible
    record = RecordDict({"a": ArrayRecord([payload])})
    grid.send_and_receive([Message(record, node_id, "query.echo") for node_id in grid.get_node_ids()])
    for counter in (grid.bytes_to_clients, grid.bytes_to_server):
        assert list(counter) == ["query.echo"]
        assert 4_000_000 < counter["query.echo"] < 4_010_000


def test_what_flower_cannot_serialise_fails_at_the_sender():
    grid = build_grid()
    too_big = RecordDict({"c": ConfigRecord({"num-bytes": 2**70})})
    with pytest.raises(ValueError):  # noqa: PT011 - the words are those of protobuf
        grid.push_messages([Message(too_big, grid.get_node_ids()[0], "train")])


def test_state_that_cannot_be_serialised_is_an_error_reply():
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.state["c"] = ConfigRecord({"num-bytes": 2**70})
        return Message(RecordDict(), reply_to=message)

    grid = build_grid(client_app=app)
    assert all(reply.has_error() for reply in grid.send_and_receive(train_messages(grid)))


def test_state_is_kept_per_node():
    grid = build_grid(num_clients=2)
    first, second = grid.get_node_ids()
    content = RecordDict({"arrays": ArrayRecord([np.zeros(1, np.float32)])})
    for expected in (1, 2):
        (reply,) = grid.send_and_receive([Message(content, first, "train")])
        assert reply.content.metric_records["metrics"]["calls"] == expected
    assert grid.state_of(first).config_records["calls"]["num"] == 2
    assert len(grid.state_of(second)) == 0


def test_client_exception_becomes_an_error_reply_and_leaves_no_state():
    grid = build_grid()
    replies = grid.send_and_receive(train_messages(grid, {"fail": 1}))
    failed = replies[1]
    assert failed.has_error()
    assert failed.error.code == 2  # CLIENT_APP_RAISED_EXCEPTION
    assert failed.error.reason == "<class 'RuntimeError'>:<'no such column'>"
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert len(grid.state_of(node_id_of(1))) == 0
    assert grid.num_error_replies == {"train": 1}


def test_unregistered_message_type_is_an_error_reply():
    grid = build_grid(num_clients=1)
    (reply,) = grid.send_and_receive([Message(RecordDict(), grid.get_node_ids()[0], "query.nothing")])
    assert reply.has_error()


def test_message_to_unknown_node_gets_no_id():
    grid = build_grid()
    assert grid.push_messages([Message(RecordDict(), 12345, "train")]) == []


def test_node_ids_are_stable_and_64_bit():
    assert build_grid().get_node_ids() == build_grid().get_node_ids() == [node_id_of(i) for i in range(3)]
    assert any(node_id_of(partition) > 2**63 for partition in range(8))


def test_dropped_and_duplicated_replies():
    def drop_first_double_second(reply: Message) -> list[Message]:
        partition = [node_id_of(i) for i in range(3)].index(reply.metadata.src_node_id)
        return [reply] * partition

    grid = build_grid(on_reply=drop_first_double_second)
    replies = grid.send_and_receive(train_messages(grid), timeout=1.0)
    assert [reply.metadata.src_node_id for reply in replies] == [node_id_of(1), node_id_of(2), node_id_of(2)]


def test_delayed_reply_arrives_with_a_later_one():
    kept: list[Message] = []

    def delay_first(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == node_id_of(0):
            kept.append(reply)
            return []
        return [reply, *(kept.pop() for _ in range(len(kept)))]

    grid = build_grid(on_reply=delay_first)
    message_ids = grid.push_messages(train_messages(grid))
    assert grid.pull_messages(message_ids) == []
    late = grid.pull_messages(message_ids)
    assert [reply.metadata.src_node_id for reply in late] == [node_id_of(1), node_id_of(0)]


def test_corrupted_reply_is_what_the_server_sees():
    def poison(reply: Message) -> list[Message]:
        reply.content = RecordDict({"arrays": ArrayRecord([np.full(4, np.nan, np.float16)])})
        return [reply]

    grid = build_grid(num_clients=1, on_reply=poison)
    (reply,) = grid.send_and_receive(train_messages(grid))
    assert np.isnan(reply.content.array_records["arrays"].to_numpy_ndarrays()[0]).all()
