from transformers_rfdetr.text_table import format_table


def test_a_table_is_returned_as_text_in_a_notebook_too(monkeypatch):
    # How rich recognizes Jupyter, where it shows its output instead of writing it to a file.
    monkeypatch.setattr("builtins.get_ipython", type("ZMQInteractiveShell", (), {}), raising=False)
    assert format_table(["class", "objects"], [["car", 3]]) == "class  objects\ncar          3"
