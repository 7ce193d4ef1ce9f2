package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func newEventsCommand() *cobra.Command {
	r := new(controlpb.WatchEventsRequest)
	c, s := controlCommand(&cobra.Command{
		Use: "events [flags]", Aliases: []string{"event"}, Short: "Show what an operator should hear of", Args: noArguments,
		Long: `Events shows what happened to the pools of a daemon since it began: damaged blocks,
failed devices, pools that fill up. With --follow it goes on until it is stopped.` + controlHelp,
		Example: `  ashlar events
  ashlar events --follow --output json | jq -r .message`,
	}, asking(func(s *session, client *control.Client, _ []string) error {
		stream, err := client.Events.Watch(s.ctx, r)
		if err != nil {
			return err
		}
		return s.writeEvents(r.GetFollow(), stream.Recv)
	}))
	c.Flags().BoolVarP(&r.Follow, "follow", "f", false, "go on with new events until interrupted")
	addPoolFlag(c, s, &r.Pool, "only those of this pool")
	return c
}

func (s *session) writeEvents(follow bool, next func() (*controlpb.Event, error)) error {
	var all []*controlpb.Event
	for {
		e, err := next()
		switch {
		case errors.Is(err, io.EOF) && s.json() && !follow:
			return writeJSON(s.out(), itemsOf(all))
		case errors.Is(err, io.EOF), follow && errors.Is(err, control.ErrCanceled): // an interrupt is how following ends
			return nil
		case err != nil:
			return err
		case !s.json():
			_, err = fmt.Fprintln(s.out(), eventLine(e))
		case follow:
			err = writeJSONLine(s.out(), e)
		default:
			all = append(all, e) // the daemon keeps no more than fit
		}
		if err != nil {
			return err
		}
	}
}

// eventLine is an event in one line: when, what, where, and its sentence.
func eventLine(e *controlpb.Event) string {
	where := e.GetPool()
	if e.GetVolume() != "" {
		where += fmt.Sprintf(" %s+%d", e.GetVolume(), e.GetOffsetBytes())
	}
	if e.GetDevice() != "" {
		where += fmt.Sprintf(" %s+%d", e.GetDevice(), e.GetAddressBytes())
	}
	return fmt.Sprintf("%s  %-9s  %s: %s", when(e.GetTime()), word(e.GetKind()), where, e.GetMessage())
}
